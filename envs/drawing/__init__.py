"""Pictures of environments and policies."""
