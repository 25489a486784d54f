import json
import subprocess
import sys


def test_a_record_is_one_json_object_with_its_traceback() -> None:
    program = (
        "import logging\n"
        "from lookalike_platform.telemetry import setup_logging\n"
        "setup_logging(style='json'); setup_logging(style='json')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.getLogger('a').exception('no %s', 'way')\n"
        "logging.getLogger('a').debug('too fine')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    record = json.loads(line)
    assert (record["level"], record["logger"], record["message"]) == ("error", "a", "no way")
    assert "ZeroDivisionError" in record["traceback"]
