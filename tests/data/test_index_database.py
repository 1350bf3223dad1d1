import multiprocessing

import pytest

from library.data.index_database import IndexDatabase

ROUNDS = 20


def opens(folder, barrier, problems):
    for number in range(ROUNDS):
        barrier.wait()
        try:
            with IndexDatabase(folder / f"{number}.sqlite").open() as database:
                database.execute("SELECT * FROM pictures")
        except Exception as error:
            problems.put(str(error))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_processes_that_make_it_at_once_wait_for_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, problems = context.Barrier(2), context.Queue()
    processes = [context.Process(target=opens, args=(tmp_path, barrier, problems)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert problems.empty(), problems.get()
