"""New tasks: adapters composed of others for tasks that have none."""
