"""The records travel with the package, so that a chapter also reads them where there is no checkout."""

from pathlib import Path

from setuptools import setup

RESULTS = Path("book/results")
folders = sorted({path.parent for path in RESULTS.rglob("*") if path.is_file()})
setup(
    data_files=[
        (
            str("share/modlib/results" / folder.relative_to(RESULTS)),
            [str(path) for path in sorted(folder.iterdir()) if path.is_file()],
        )
        for folder in folders
    ]
)
