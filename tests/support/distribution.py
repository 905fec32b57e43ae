"""What a release consists of."""

from cluster import ROOT

# For people who read the repository; the server draws its charts from the SVG files.
NOT_INSTALLED = {".mmd", ".pyc"}


def packaged_files():
    """The paths of the files that the wheel must bring, relative to its root."""
    return {
        str(path.relative_to(ROOT))
        for package in ("lesson_server", "statecharts")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in NOT_INSTALLED
    }
