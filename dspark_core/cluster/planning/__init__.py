"""Plans for verifiers, and what they rest on: pace, curves, calibration, drafters' prices."""
