from apollo_sft.data.store.summary import BadRows, StoreSummary
from apollo_sft.data.tally import MAX_EXAMPLES, Tally


def test_a_tally_names_the_first_examples_only() -> None:
    tally = Tally()
    for number in range(MAX_EXAMPLES + 3):
        tally.add(f"row {number}", count=2)
    assert (tally.count, tally.examples) == (2 * (MAX_EXAMPLES + 3), [f"row {i}" for i in range(MAX_EXAMPLES)])


def test_tallies_are_merged_in_the_order_of_the_rows() -> None:
    first, later, last = Tally(2, ["a", "b"]), Tally(9, ["c", "d", "e", "f"]), Tally(1, ["g"])
    first.merge(later)
    first.merge(last)
    assert (first.count, first.examples) == (12, ["a", "b", "c", "d", "e"])
    assert (later.examples, last.examples) == (["c", "d", "e", "f"], ["g"])


def test_a_summary_is_read_as_it_was_written() -> None:
    summary = StoreSummary(["f"], num_rows=9, num_samples=5, num_tokens=70, num_targets=30, longest_row="f row 3")
    summary.over_max_length.add("f row 3 (99 tokens)")
    summary.not_trained.add("f row 4")
    summary.findings["empty_replies"] = Tally(3, ["f row 1"])
    summary.bad["no text"] = BadRows(Tally(2, ["f row 5", "f row 6"]), "f row 5: no text")
    summary.stop_tokens = {7: 5}
    written = summary.to_json()
    assert StoreSummary.from_json(written) == summary
    assert (written["rows_bad"], written["first_over_max_length"]) == (2, "f row 3 (99 tokens)")
    assert (written["found"], written["first"]) == ({"empty_replies": 3}, {"empty_replies": ["f row 1"]})
