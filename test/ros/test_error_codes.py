"""The error codes of the interfaces are those of edgellm_ros.errors."""

from __future__ import annotations

import re
from pathlib import Path

from edgellm_ros.action import Chat
from edgellm_ros.msg import ErrorCode
from edgellm_ros.srv import Generate, LoadLora, ResetSession, Tokenize

from edgellm_ros import errors
from edgellm_ros.ros.client import error_from_code

ROOT = Path(__file__).resolve().parent.parent.parent
DRAWN = re.compile(r"(\w+Error) +(\d+) +([A-Z_]+)")


def classes() -> list[type[errors.EdgeLLMError]]:
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.EdgeLLMError)]
    assert len(found) > 10
    return found


def constants() -> dict[str, int]:
    text = (ROOT / "msg" / "ErrorCode.msg").read_text()
    return {name: getattr(ErrorCode, name) for name in re.findall(r"uint16 (\w+)=", text)}


def test_every_error_has_its_constant_under_the_name_that_errors_draws():
    drawn = {name: (int(code), constant) for name, code, constant in DRAWN.findall(errors.__doc__)}
    assert set(drawn) == {c.__name__ for c in classes()}
    expected = {constant: code for code, constant in drawn.values()} | {"NONE": 0}
    assert constants() == expected
    assert {name: code for name, (code, _) in drawn.items()} == {c.__name__: c.code for c in classes()}


def test_codes_are_distinct_and_none_is_success():
    codes = [c.code for c in classes()]
    assert len(set(codes)) == len(codes) and 0 not in codes


def test_every_result_carries_a_code_and_a_message():
    for result in (Chat.Result, Generate.Response, Tokenize.Response, ResetSession.Response, LoadLora.Response):
        fields = result.get_fields_and_field_types()
        assert (fields["error_code"], fields["error_msg"]) == ("uint16", "string")


def test_the_client_turns_every_code_back_into_its_exception():
    for kind in classes():
        assert type(error_from_code(kind.code, "x")) is kind
    assert type(error_from_code(60000, "x")) is errors.EdgeLLMError
