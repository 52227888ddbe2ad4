"""The petals-agent command."""
