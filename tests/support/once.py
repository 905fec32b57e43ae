"""What takes seconds to make is made by one process of xdist, for all of them."""

import fcntl
import os


def made_once(tmp_path_factory, name, make):
    """A folder with what ``make`` leaves in it.

    Args:
        name: the name of the folder, the same in each process.
        make: takes the folder, which is empty, and fills it.
    """
    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent
    folder, made = run / name, run / f"{name}.made"
    with (run / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not made.exists():
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
