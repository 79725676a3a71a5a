"""`edgellm run`: a file of requests in, a file of answers out, in TensorRT-Edge-LLM's format."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_ros.cli.options import add_settings, settings_from, was_given
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import DeviceError, EdgeLLMError, RequestError

if TYPE_CHECKING:
    from edgellm_ros.cli.batch_file import BatchFile
    from edgellm_ros.core import Completion, Request
    from edgellm_ros.llm import LLM
    from edgellm_ros.runtime.generation import Generation

# Where a file cannot be made beside the old one or take its place, as one that is mounted alone (docker -v FILE:FILE).
_NO_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)

_SLOTS = (
    "Sequences that decode together; on a GPU eight at a time, and more take turns. Without it as many as batch_size "
    "says and there are requests, at most 64."
)

HELP = "answer a file of requests (TensorRT-Edge-LLM's format)"
EXAMPLES = """\
examples:
  edgellm run --bundle smollm2 --input-file in.json --output-file out.json
  edgellm run --bundle smollm2 --input-file in.json --dump-profile --profile-output-file profile.json

the smallest input file:
  {"temperature": 0, "max_generate_length": 64,
   "requests": [{"messages": [{"role": "user", "content": "What is ROS 2?"}]}]}

batch_size says how many requests run at once. A field that cannot be honoured is an error, never ignored.
The answers are `responses[].output_text`; one that failed has finish_reason "error", and the exit code is 2.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "--bundle", type=Path, required=True, metavar="BUNDLE", help="directory that `edgellm export` wrote"
    )
    parser.add_argument("--input-file", type=Path, required=True, metavar="JSON", help="the requests")
    parser.add_argument(
        "--output-file", type=Path, metavar="JSON", help="where the answers go (default: standard output)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="replaces the file's batch_size")
    parser.add_argument("--max-generate-length", type=int, metavar="N", help="replaces the file's max_generate_length")
    parser.add_argument("--dump-profile", action="store_true", help="show tokens/s, percentiles and memory at the end")
    parser.add_argument("--profile-output-file", type=Path, metavar="JSON", help="write the same as JSON")
    parser.add_argument("--lora", default="", metavar="NAME", help="adapter of requests that have no lora_name")
    add_settings(parser, EngineConfig, "engine", skip=("loras",), helps={"max_slots": _SLOTS})


def execute(args: argparse.Namespace) -> int:
    """Check the whole file, load the bundle, answer, write."""
    from rich.console import Console

    from edgellm_ros.cli.batch_file import read_batch_file
    from edgellm_ros.cli.profile import build_profile, profile_table
    from edgellm_ros.llm import LLM

    overrides = {"batch_size": args.batch_size, "max_generate_length": args.max_generate_length}
    batch = read_batch_file(args.input_file, {name: value for name, value in overrides.items() if value is not None})
    _check_outputs(args)
    config = settings_from(args, EngineConfig())
    if not was_given(args, EngineConfig, "max_slots"):
        config = replace(config, max_slots=min(batch.batch_size, len(batch.requests), 64))
    requests = tuple(replace(r, lora=r.lora or args.lora) for r in batch.requests)
    batch = replace(batch, requests=requests)
    loras = sorted({request.lora for request in requests if request.lora})
    with LLM.open(args.bundle, config, loras=loras) as llm:
        started = time.monotonic()
        responses = _answer_all(llm, batch, min(batch.batch_size, config.max_slots + config.max_queue))
        profile = build_profile(llm, time.monotonic() - started)
    _write(args.output_file, {"input_file": str(args.input_file), "responses": responses}, indent=4)
    if args.profile_output_file:
        _write(args.profile_output_file, profile, indent=2)
    if args.dump_profile:
        Console(stderr=True, highlight=False).print(profile_table(profile))
    failed = [r for r in responses if r["finish_reason"] == "error"]
    for response in failed:
        print(f"error: requests[{response['request_idx']}]: {response['error']}", file=sys.stderr)
    return 2 if failed else 0


def _answer_all(llm: LLM, batch: BatchFile, num_in_flight: int) -> list[dict[str, Any]]:
    """Keep `num_in_flight` requests running; the responses come in the file's order."""
    running: list[tuple[int, Generation | EdgeLLMError]] = []
    responses = []
    for index in range(len(batch.requests) + num_in_flight):
        if len(running) == num_in_flight or index >= len(batch.requests):
            if not running:
                break
            responses.append(_response(llm, batch, *running.pop(0)))
        if index < len(batch.requests):
            running.append((index, _submit(llm, batch.requests[index])))
    return responses


def _submit(llm: LLM, request: Request) -> Generation | EdgeLLMError:
    try:
        return llm.submit(request)
    except RequestError as error:
        return error


def _response(llm: LLM, batch: BatchFile, index: int, work: Generation | EdgeLLMError) -> dict[str, Any]:
    request = batch.requests[index]
    response: dict[str, Any] = {
        "request_idx": index,
        "batch_idx": index % batch.batch_size,
        "output_text": "",
        "finish_reason": "error",
        "messages": batch.messages[index],
        "formatted_system_prompt": "",
        "formatted_complete_request": "",
    }
    try:
        if isinstance(work, EdgeLLMError):
            raise work
        completion = work.result()
        response["formatted_complete_request"] = llm.render(request)
        response["formatted_system_prompt"] = _system_prompt(llm, request)
        response.update(_answer(llm, completion))
    except DeviceError:
        raise  # nothing after it can work
    except EdgeLLMError as error:
        response.update(error=str(error), error_code=error.code)
    return response


def _answer(llm: LLM, completion: Completion) -> dict[str, Any]:
    usage = completion.usage
    answer: dict[str, Any] = {
        "output_text": completion.text,
        "finish_reason": completion.finish_reason.value,
        "output_ids": list(completion.token_ids),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "time_to_first_token_ms": round(usage.time_to_first_token_s * 1000, 3),
            "total_ms": round(usage.total_s * 1000, 3),
        },
    }
    if completion.reasoning:
        answer["reasoning_text"] = completion.reasoning
    if completion.logprobs:
        answer["logprobs"] = [
            [
                {"token_id": token, "token": llm.detokenize([token], skip_special=False), "logprob": logprob}
                for token, logprob in (step.top or ((step.token_id, step.logprob),))
            ]
            for step in completion.logprobs
        ]
    return answer


def _system_prompt(llm: LLM, request: Request) -> str:
    """The part of the prompt that does not depend on what follows the system message."""
    if not request.messages or request.messages[0].role != "system":
        return ""
    texts = [
        llm.render(
            replace(
                request, messages=(request.messages[0], replace(request.messages[-1], role="user", content=content))
            )
        )
        for content in ("\u00b7", "a")
    ]
    length = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    return texts[0][:length]


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise RequestError now for what could not be written, or would replace another file, after all the answers."""
    taken = {"--input-file": args.input_file}
    for option, path in (("--output-file", args.output_file), ("--profile-output-file", args.profile_output_file)):
        if path is None:
            continue
        if path.is_dir():
            raise RequestError(f"{option} {path} is a directory; name a file in it")
        if not path.absolute().parent.is_dir():
            raise RequestError(f"{option} {path}: {path.absolute().parent} is not a directory; make it first")
        if path.exists() and not path.is_file():  # a pipe or a device, left to the one who named it
            continue
        for other, theirs in taken.items():
            if path.resolve() == theirs.resolve() or (path.exists() and theirs.exists() and path.samefile(theirs)):
                raise RequestError(f"{option} {path} is the {other} too; name another file")
        try:
            if path.exists():
                path.open("ab").close()
            else:
                with tempfile.TemporaryFile(dir=path.resolve().parent):
                    pass
        except OSError as error:
            raise RequestError(f"{option} {path} cannot be written ({error.strerror}); name another file") from error
        taken[option] = path


def _write(path: Path | None, data: dict[str, Any], indent: int) -> None:
    """The file is whole, or as it was before."""
    # A path that is no UTF-8 (in `input_file`) has halves of UTF-16 pairs, which become JSON's escapes.
    content = (json.dumps(data, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    if path is None:
        sys.stdout.write(content.decode("utf-8"))
        return
    final = path.resolve()  # of a link the file that it points to is replaced
    partial = final.with_name(f".{os.getpid()}.partial")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        try:
            partial.write_bytes(content)
            if path.exists():
                shutil.copymode(path, partial)
            partial.replace(final)
        except OSError as error:
            if error.errno not in _NO_RENAME or not path.exists():
                raise
            path.write_bytes(content)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}; make room there, or name another file") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
