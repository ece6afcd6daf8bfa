"""What was loaded while a server ran, kept for its next start."""

import json
from pathlib import Path

from graft.errors import DamagedError
from graft.files import write_json

_REMEDY = "remove it: adapters that came in by request are then not listed again"


class State:
    """A file with the names and folders of adapters that came in by request, in a folder of the user's choice."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "adapters.json"

    def read(self) -> dict[str, str]:
        """Folders by name, relative to the adapter root. Raises `DamagedError`."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DamagedError(f"{self.path} cannot be read ({error})", _REMEDY) from None
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise DamagedError(f"{self.path} is not as it was written", _REMEDY)
        return found

    def add(self, name: str, folder: str) -> None:
        """Note an adapter. Raises `ResourceError` where the file cannot be written."""
        write_json(self.path, self.read() | {name: folder})

    def drop(self, name: str) -> None:
        """Forget an adapter. Raises `ResourceError`."""
        kept = self.read()
        if kept.pop(name, None) is not None:
            write_json(self.path, kept)
