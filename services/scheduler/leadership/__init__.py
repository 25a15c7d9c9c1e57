"""Which of several schedulers leads: elections and their locks."""
