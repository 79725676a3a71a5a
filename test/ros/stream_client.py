"""A client in a process of its own: streams one goal, says when it has begun, and prints what came as JSON.

    python stream_client.py PROMPT MAX_TOKENS [cancel | crash | leave]

cancel and crash after three deltas; leave ends Python then, without closing the client, and says whether its thread
still ran at the very end.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading

from edgellm_ros.ros.client import LLMClient

prompt, max_tokens, mode = sys.argv[1], int(sys.argv[2]), (sys.argv[3:] or [""])[0]
if mode == "leave":  # called after what is registered later
    atexit.register(lambda: print([thread.name for thread in threading.enumerate() if thread.daemon], flush=True))
llm = LLMClient("llm")
if mode == "leave":
    for index, _ in enumerate(llm.chat(prompt, max_tokens=max_tokens, ignore_eos=True)):
        if index == 0:
            print("begun", flush=True)
        if index == 2:
            sys.exit()
with llm:
    stream = llm.chat(prompt, max_tokens=max_tokens, temperature=0.8, seed=7, ignore_eos=True)
    deltas = []
    for delta in stream:
        deltas.append(delta)
        if len(deltas) == 1:
            print("begun", flush=True)
        if len(deltas) == 3 and mode == "cancel":
            stream.cancel()
        if len(deltas) == 3 and mode == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
    result = stream.result()
    print(json.dumps({"deltas": deltas, "text": result.text, "reason": result.finish_reason}), flush=True)
