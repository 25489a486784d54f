import json

import pytest

from lookalike_platform.errors import (
    FieldProblem,
    InvalidRequest,
    LookalikeError,
    NotFound,
    TooLate,
    UnknownBase,
    fault_of,
    of_problem,
)


def test_an_error_tells_its_problem_with_the_fields_that_are_wrong() -> None:
    error = InvalidRequest("two values are wrong", [FieldProblem("config.rank", "at least 1")])
    assert error.problem() == {
        "type": "urn:lookalike:problem:invalid-request",
        "title": "The request cannot be carried out as it is",
        "status": 422,
        "detail": "two values are wrong",
        "errors": [{"path": "config.rank", "message": "at least 1"}],
    }
    assert str(error) == "two values are wrong\n  config.rank: at least 1"


def test_errors_are_hashable_as_exceptions_must_be() -> None:
    assert len({LookalikeError("a"), LookalikeError("a")}) == 2


@pytest.mark.parametrize(
    ("raised", "told"), [(NotFound, InvalidRequest), (UnknownBase, UnknownBase)]
)
def test_a_look_up_that_fails_is_the_fault_of_a_field(
    raised: type[LookalikeError], told: type[LookalikeError]
) -> None:
    with pytest.raises(told) as refused, fault_of("adapters[0].ref"):
        raise raised("there is no rex@3")
    assert type(refused.value) is told
    assert refused.value.fields == [FieldProblem("adapters[0].ref", "there is no rex@3")]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", [FieldProblem("unet.to_k", "is [4, 32], the base needs [4, 16]")]),
        UnknownBase("there is no such base"),
        TooLate("too much else was waiting"),
        LookalikeError("out of memory"),
    ],
)
def test_an_error_comes_whole_from_another_process(error: LookalikeError) -> None:
    again = of_problem(json.loads(json.dumps(error.problem())))
    assert type(again) is type(error)
    assert again.problem() == error.problem()
