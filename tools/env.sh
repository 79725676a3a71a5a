# Source this to run edgellm_ros from the repository: . tools/env.sh
# Puts .venv, the ROS 2 in it (where none is sourced) and the built interfaces on the paths. bash, zsh and dash.
if [ -n "${BASH_SOURCE:-}" ]; then _edgellm_file="${BASH_SOURCE}"; else _edgellm_file="${EDGELLM_ROOT:-.}/tools/env.sh"; fi
EDGELLM_ROOT="$(cd "$(dirname "$_edgellm_file")/.." && pwd)"
_edgellm_venv="$EDGELLM_ROOT/.venv"
export EDGELLM_ROOT
export PATH="$_edgellm_venv/bin:$PATH"
if [ -z "${ROS_DISTRO:-}" ] || [ -z "${AMENT_PREFIX_PATH:-}" ] || [ "${EDGELLM_ROS_WHEELS:-}" = 1 ]; then
  export ROS_DISTRO=jazzy
  export EDGELLM_ROS_WHEELS=1
  export AMENT_PREFIX_PATH="$EDGELLM_ROOT/install:$_edgellm_venv"
  for _edgellm_dir in "$_edgellm_venv/lib" "$_edgellm_venv"/lib/python3.*/site-packages/ros_*.libs; do
    if [ -d "$_edgellm_dir" ]; then LD_LIBRARY_PATH="$_edgellm_dir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"; fi
  done
  export _ROS_WHEELS_BOOTSTRAP_COMPLETE=1  # the wheels would otherwise restart Python to set LD_LIBRARY_PATH
else
  export AMENT_PREFIX_PATH="$EDGELLM_ROOT/install:$AMENT_PREFIX_PATH"
fi
export LD_LIBRARY_PATH="$EDGELLM_ROOT/install/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
for _edgellm_dir in "$EDGELLM_ROOT"/install/lib/python3*/*-packages "$EDGELLM_ROOT"/install/local/lib/python3*/*-packages; do
  if [ -d "$_edgellm_dir" ]; then PYTHONPATH="$_edgellm_dir${PYTHONPATH:+:$PYTHONPATH}"; fi
done
export PYTHONPATH="$EDGELLM_ROOT${PYTHONPATH:+:$PYTHONPATH}"  # the source tree first: nothing installed is ever stale
unset _edgellm_file _edgellm_venv _edgellm_dir
