"""The table of decisions: a row a layer, with what its numbers mean."""

from ada_loss.core.decision import Decision, Site
from ada_loss.core.decision_table import HEADINGS, LEGEND, decision_table
from ada_loss.core.range import Range
from ada_loss.core.rules import AUTO, FIXED


def decision(path, call=0, exponent=0, shift=0, rule=AUTO, zeros=0.0):
    return Decision(Site(path, call), rule, exponent, shift, Range(zeros=zeros))


def rows(*decisions):
    heading, *lines = decision_table(decisions).removesuffix(LEGEND).splitlines()
    assert heading.split() == list(HEADINGS)
    return lines


def test_a_layer_has_a_row_with_what_arrives_what_it_adds_and_what_leaves():
    (row,) = rows(decision("/head", exponent=3, shift=-5, zeros=0.25))
    assert row.split() == ["/head", "auto", "1", "3", "-5", "-2", "0.25"]


def test_repeated_calls_of_a_layer_are_one_row():
    (row,) = rows(decision("/cell", 0, 2, 1), decision("/cell", 1, 7, 1, zeros=0.5))
    assert row.split() == ["/cell", "auto", "2", "2,", "7", "1", "3,", "8", "0.50"]


def test_layers_come_in_the_order_of_backward_and_in_columns():
    lines = rows(decision("/b", shift=100), decision("/a/long/path", rule=FIXED))
    assert [line.split()[0] for line in lines] == ["/b", "/a/long/path"]
    assert len({len(line) for line in lines}) == 1


def test_the_table_says_what_its_numbers_mean():
    assert decision_table([decision("/a")]).endswith(LEGEND)
