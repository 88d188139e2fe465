"""What stands around Table 1; its rows are in test_paper.py, which needs the harness."""

from modeling_ivtp.evaluation import paper, tables
from modeling_ivtp.evaluation.paper import Measured


def test_the_page_says_that_the_printed_rows_were_retrained() -> None:
    page = tables.page(tables.summary(Measured({}, {}, None), []))
    assert "The printed rows are of models that were retrained while pruned." in page
    assert "the average over all twelve alone: TopK 54.1, ToMe 57.5, IVTP-V 58.5, IVTP 59.6." in page


def test_the_printed_losses_are_those_that_pages_quote() -> None:
    unpruned = paper.PRINTED["LLaVA-1.5-7B, replicated"][12]
    assert round(unpruned - paper.PRINTED["IVTP"][12], 1) == 1.0
    assert round(unpruned - paper.PRINTED_UNTRAINED["IVTP"], 1) == 3.4
