"""What tests of evaluations share."""

import pytest

from sparsejax.evaluation import figures


@pytest.fixture
def plain_report(monkeypatch):
  """Reports without pictures, which take longer to draw than small models to measure."""
  monkeypatch.setattr(figures, "draw", lambda task, shown: [])
