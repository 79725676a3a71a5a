"""A planner's use of a language model: stream an answer, stop it when enough has come, and ask for a decision.

Start a node first: `ros2 launch edgellm_ros llm.launch.py bundle:=BUNDLE`.
"""

from edgellm_ros.ros.client import LLMClient

with LLMClient("llm") as llm:
    with llm.chat("Describe a kitchen to a robot.", max_tokens=200) as stream:
        text = ""
        for delta in stream:
            print(delta, end="", flush=True)
            text += delta
            if text.count(".") >= 2:
                break  # leaving the block cancels the goal
    answer = llm.generate([("system", "Answer yes or no."), ("user", "May I leave the stove on?")], temperature=0.0)
    print("\n---", answer.text, f"({answer.finish_reason}, {answer.usage.completion_tokens} tokens)")
