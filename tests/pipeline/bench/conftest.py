from tests.support.bench_fakes import stages  # noqa: F401
