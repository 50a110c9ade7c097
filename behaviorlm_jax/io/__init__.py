"""Where logs, models and work directories lie: disk, hub, bucket."""
