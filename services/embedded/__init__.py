"""All four roles on one machine; the one place that wires several services."""
