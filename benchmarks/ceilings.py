"""What a device's memory gives at most, as one JSON object: `python -m benchmarks.ceilings DEVICE`, from a checkout."""

import json
import sys
from dataclasses import asdict

from compiled_logprobs.machine.bandwidth import measured_bandwidth
from compiled_logprobs.machine.nvml import Watch, telemetry

if __name__ == "__main__":
    device = sys.argv[1]
    provider = telemetry(device)
    with Watch(provider) as watch:
        bandwidth = measured_bandwidth(device)
    summary = watch.summary()
    seen = {"telemetry": None if summary is None else asdict(summary), "telemetry_reason": provider.reason}
    sys.stdout.write(json.dumps({"bandwidth": asdict(bandwidth), **seen}) + "\n")
