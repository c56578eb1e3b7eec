from tests.pipeline.bench.fakes import stages  # noqa: F401
