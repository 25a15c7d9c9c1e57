"""Who calls: API keys, their tiers and quotas."""
