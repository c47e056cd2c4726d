"""What a run has recorded, as a page, pictures, a table, or for TensorBoard: `python -m ada_loss.report`.

Charts are Altair's, since one description of a chart gives both the interactive page, without a network, and
the PNG, without a browser. Its packages come with `pip install "ada-loss[report]"`; the table needs none.
"""
