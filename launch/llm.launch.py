"""Starts the llm node: `ros2 launch edgellm_ros llm.launch.py bundle:=/path/to/bundle`."""

from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """One lifecycle node that configures and activates itself (parameter autostart)."""
    default_params = PathJoinSubstitution([FindPackageShare("edgellm_ros"), "config", "llm.yaml"])
    arguments = [
        DeclareLaunchArgument("bundle", description="Directory that `edgellm export` wrote."),
        DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node."),
        DeclareLaunchArgument("name", default_value="llm", description="Name of the node."),
        DeclareLaunchArgument("params_file", default_value=default_params, description="YAML file of parameters."),
        DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal."),
    ]
    node = LifecycleNode(
        package="edgellm_ros",
        executable="llm_node",
        namespace=LaunchConfiguration("namespace"),
        name=LaunchConfiguration("name"),
        parameters=[
            LaunchConfiguration("params_file"),
            {"bundle": ParameterValue(LaunchConfiguration("bundle"), value_type=str)},
        ],
        arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
        output="both",
        emulate_tty=True,
    )
    return LaunchDescription([*arguments, node])
