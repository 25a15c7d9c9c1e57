"""The dspark command."""
