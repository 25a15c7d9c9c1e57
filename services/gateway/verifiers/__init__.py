"""Where tokens come from: verifiers by way of the scheduler, and what happens when one is lost."""
