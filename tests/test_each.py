"""A test of many items checks all of them and can fail."""

import pytest

from tests.each import each


def odd(number, limit=9):
    assert number % 2, "even"
    assert 6 // (number - 7) < limit


def test_every_offender_is_named_and_none_hides_the_next():
    with pytest.raises(pytest.fail.Exception) as caught:
        each([1, 2, 3, 4, 7], name=lambda number: f"<{number}>")(odd)()
    message = str(caught.value)
    assert message.startswith("3 of 5:") and "<1>" not in message and "<3>" not in message
    assert "<2>: AssertionError: even" in message and "<4>: AssertionError: even" in message
    assert "<7>: ZeroDivisionError" in message


def test_a_check_that_expects_an_error_in_vain_offends():
    def raises(_):
        with pytest.raises(KeyError):
            pass

    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        each([0])(raises)()


def test_no_items_are_no_success():
    with pytest.raises(pytest.fail.Exception, match="0 of 0"):
        each([])(odd)()


@each([1, 3, 5])
def test_items_share_the_fixtures(number, tmp_path):
    odd(number)
    (tmp_path / str(number)).touch()
    assert len(list(tmp_path.iterdir())) == (number + 1) // 2
