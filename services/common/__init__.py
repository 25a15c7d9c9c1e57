"""What every service shares: serving, errors, telemetry, registration, channels."""
