"""Names that are looked up, and the arguments that go with them: what is wrong is said in one line."""

import pytest

from jdiff.core.names import check_arguments, choose

TABLE = {"heun": 1, "ddim": 2}


def test_what_a_name_stands_for():
    assert [choose("solver", name, TABLE) for name in TABLE] == [1, 2]


@pytest.mark.parametrize(
    "name,said",
    [
        ("hune", r"unknown solver 'hune' \(did you mean 'heun'\?\); one of heun, ddim$"),
        ("", r"unknown solver ''; one of heun, ddim$"),
        (3, r"unknown solver 3; one of heun, ddim$"),
        (None, r"unknown solver None; one of"),
        (["heun"], r"unknown solver \['heun'\]; one of"),
    ],
)
def test_a_wrong_name(name, said):
    with pytest.raises(ValueError, match=said):
        choose("solver", name, TABLE)


def plain(schedule, n, rho, lowest=0.0):
    del schedule, n, rho, lowest


def anything(n, **rest):
    del n, rest


@pytest.mark.parametrize(
    "make,args,given,said",
    [
        (plain, {"rho": 1}, ("schedule", "n"), None),
        (plain, {"rho": 1, "lowest": 2}, ("schedule", "n"), None),
        (plain, {}, ("schedule", "n"), "grid 'g' needs the argument 'rho'"),
        (plain, {"rho": 1, "lowst": 2}, ("schedule", "n"), r"'lowst' \(did you mean 'lowest'\?\); valid: rho, lowest"),
        (plain, {"rho": 1, "n": 2}, ("schedule", "n"), "has no argument 'n'; valid: rho, lowest"),
        (lambda: None, {"n": 2}, (), "has no argument 'n'; valid: none"),
        (anything, {"n": 1, "more": 2}, (), None),
        (anything, {"more": 2}, (), "needs the argument 'n'"),
        (lambda *rows: None, {}, (), None),
    ],
)
def test_arguments(make, args, given, said):
    if said is None:
        check_arguments("grid 'g'", make, args, given)
        return
    with pytest.raises(ValueError, match=said):
        check_arguments("grid 'g'", make, args, given)
