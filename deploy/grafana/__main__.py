"""Writes the dashboards: `python -m deploy.grafana`."""

from deploy.grafana.boards import FOLDER, boards

if __name__ == "__main__":
    for file in FOLDER.glob("*.json"):
        file.unlink()
    for board in boards():
        (FOLDER / f"{board.name}.json").write_text(board.json(), encoding="utf-8")
