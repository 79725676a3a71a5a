"""The ROS 2 half: nodes that translate between messages and the library, and a client for planners."""
