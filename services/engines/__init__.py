"""What drafter and verifier, the services that hold a model, share."""
