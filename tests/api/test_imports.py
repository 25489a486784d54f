"""What the API process loads; how fast it does is benchmarks/api_import.py's business."""

import subprocess
import sys

HEAVY = {"torch", "mlflow", "numpy", "transformers", "diffusers", "accelerate", "deepspeed"}


def loaded_by(statement: str) -> set[str]:
    program = f"{statement}\nimport sys; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return {name.partition(".")[0] for name in said.stdout.split()}


def test_the_api_loads_without_torch_and_mlflow() -> None:
    program = (
        "import tempfile, pathlib\n"
        "from lookalike_api.http.app import create_app\n"
        "from lookalike_platform.settings import Settings\n"
        "create_app(Settings(home=pathlib.Path(tempfile.mkdtemp()))).openapi()"
    )
    assert not loaded_by(program) & HEAVY


def test_the_client_loads_next_to_nothing() -> None:
    loaded = loaded_by("import lookalike_api.client")
    assert not loaded & {*HEAVY, "fastapi", "celery", "sqlalchemy", "uvicorn"}
