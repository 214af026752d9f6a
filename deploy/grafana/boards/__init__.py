"""The eight dashboards, in the order in which they are read."""

from pathlib import Path

from deploy.grafana.board import Board
from deploy.grafana.boards.engine import ENGINE
from deploy.grafana.boards.learning import LEARNING
from deploy.grafana.boards.overview import OVERVIEW
from deploy.grafana.boards.runtime import RUNTIME
from deploy.grafana.boards.state import STATE
from deploy.grafana.boards.streams import STREAMS
from deploy.grafana.boards.tenants import TENANTS
from deploy.grafana.boards.trainers import TRAINERS

FOLDER = Path(__file__).parents[1] / "dashboards"


def boards() -> tuple[Board, ...]:
    """All of them."""
    return (OVERVIEW, LEARNING, STREAMS, ENGINE, STATE, TRAINERS, TENANTS, RUNTIME)
