"""Prints the folder of libnvrtc.so as pip installs it."""

from pathlib import Path

import nvidia

libraries = (path for root in nvidia.__path__ for path in Path(root).rglob("libnvrtc.so*"))
print(next(libraries).parent)
