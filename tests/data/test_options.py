"""Former names of options."""

import json

from ldm.data.options import rename_options, to_former_names


def test_options_are_read_under_their_former_names():
    former = {"lanes": 4, "least": {"width": 8}, "shuffle": 9}
    options = {"streams": 4, "minimum": {"width": 8}, "shuffle": 9}
    assert rename_options("shards", former) == rename_options("shards", options) == options
    assert json.dumps(to_former_names("shards", options)) == json.dumps(former)


def test_of_an_option_under_both_names_the_later_one_counts():
    assert rename_options("mask", {"full_probability": 0.1, "whole": 0.2}) == {
        "full_probability": 0.2
    }
