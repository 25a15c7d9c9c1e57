"""What every service shares: serving, errors, telemetry, registry, channels."""
