/* A stand-in for libnvidia-ml.so.1, NVML as the driver brings it: up to eight GPUs, the second of which has a slice.
 *
 * FAKE_NVML_INIT     what nvmlInit returns (default 0, success)
 * FAKE_NVML_RETURN   what every other query returns
 * FAKE_NVML_REASONS  the bits of the throttle reasons
 * FAKE_NVML_POWER    milliwatts
 * FAKE_NVML_GPUS     how many GPUs there are (default 2)
 * FAKE_NVML_HIDDEN   what asking for the processes returns
 * FAKE_NVML_LOST     the index of a GPU that is lost: nothing that is asked about it is answered
 * FAKE_NVML_LOST_AT  "handle" if it does not even get a handle; by default, what was its handle is of no use any more
 * -D OLD_DRIVER      leaves out what older drivers do not have
 */
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };

typedef struct device {
    const char *uuid, *address;
    struct device *whole;
    unsigned number;
} device;

static device devices[] = {
    {"GPU-aaaaaaaa-0000-0000-0000-000000000000", "00000000:0A:00.0", 0, 1},
    {"GPU-bbbbbbbb-0000-0000-0000-000000000000", "00000000:8B:00.0", 0, 2},
    {"MIG-cccccccc-0000-0000-0000-000000000000", "", &devices[1], 3},
    {"GPU-00000000-9999-0000-0000-000000000000", "00000000:E0:00.0", 0, 4},
    {"GPU-11111111-9999-0000-0000-000000000000", "00000000:E1:00.0", 0, 5},
    {"GPU-22222222-9999-0000-0000-000000000000", "00000000:E2:00.0", 0, 6},
    {"GPU-33333333-9999-0000-0000-000000000000", "00000000:E3:00.0", 0, 7},
    {"GPU-44444444-9999-0000-0000-000000000000", "00000000:E4:00.0", 0, 8},
    {"GPU-55555555-9999-0000-0000-000000000000", "00000000:E5:00.0", 0, 9},
};

static unsigned setting(const char *name, unsigned otherwise) {
    const char *text = getenv(name);
    return text ? (unsigned)strtoul(text, 0, 0) : otherwise;
}

static unsigned hidden(void) { return setting("FAKE_NVML_HIDDEN", SUCCESS); }
static int answer(device *d) {
    unsigned number = (d->whole ? d->whole : d)->number;
    return number == setting("FAKE_NVML_LOST", -2) + 1 ? GPU_IS_LOST : (int)setting("FAKE_NVML_RETURN", SUCCESS);
}

int nvmlInitWithFlags(unsigned flags) { return (int)setting("FAKE_NVML_INIT", SUCCESS); }

static int find(const char *name, int by_uuid, device **found) {
    for (unsigned i = 0; i < sizeof devices / sizeof *devices; i++)
        if (!strcmp(name, by_uuid ? devices[i].uuid : devices[i].address)) {
            *found = &devices[i];
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device **found) { return find(uuid, 1, found); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *address, device **found) { return find(address, 0, found); }

int nvmlDeviceGetCount_v2(unsigned *count) { return *count = setting("FAKE_NVML_GPUS", 2), SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **found) {
    if (index >= setting("FAKE_NVML_GPUS", 2)) return INVALID_ARGUMENT;
    *found = &devices[index < 2 ? index : index + 1];
    if (index == setting("FAKE_NVML_LOST", -2) && getenv("FAKE_NVML_LOST_AT")) return GPU_IS_LOST;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(device *d, unsigned *count) { return *count = d->number == 2 ? 7 : 0, answer(d); }

int nvmlDeviceGetMigDeviceHandleByIndex(device *d, unsigned index, device **slice) {
    if (d->number != 2 || index != 3) return NOT_FOUND; /* places may be empty */
    *slice = &devices[2];
    return SUCCESS;
}

int nvmlDeviceGetUUID(device *d, char *uuid, unsigned size) {
    strncpy(uuid, d->uuid, size);
    return answer(d) == GPU_IS_LOST ? GPU_IS_LOST : SUCCESS;
}
int nvmlDeviceGetName(device *d, char *name, unsigned size) {
    return strncpy(name, d->number == 3 ? "NVIDIA Fake 80GB MIG 1g.10gb" : "NVIDIA Fake 80GB", size), answer(d);
}
int nvmlSystemGetDriverVersion(char *version, unsigned size) { return strncpy(version, "999.1", size), SUCCESS; }

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device *slice, device **whole) {
    if (!slice->whole) return INVALID_ARGUMENT;
    *whole = slice->whole;
    return SUCCESS;
}

/* as NVML has it: total = reserved + available + used */
typedef struct { unsigned version; unsigned long long total, reserved, available, used; } memory;
int nvmlDeviceGetMemoryInfo_v2(device *d, memory *m) {
    m->total = d->number * 1000ull;
    m->used = d->number * 100ull;
    m->reserved = d->number * 50ull;
    m->available = m->total - m->reserved - m->used;
    return answer(d);
}

typedef struct { unsigned gpu, memory; } utilisation;
int nvmlDeviceGetUtilizationRates(device *d, utilisation *u) {
    u->gpu = 0;
    u->memory = 40 + d->number;
    return answer(d);
}

/* clock: 1 of the multiprocessors, 2 of the memory */
int nvmlDeviceGetClockInfo(device *d, unsigned clock, unsigned *mhz) { return *mhz = clock * 1000 + d->number, answer(d); }
int nvmlDeviceGetMaxClockInfo(device *d, unsigned clock, unsigned *mhz) { return *mhz = clock * 2000 + d->number, answer(d); }
int nvmlDeviceGetPowerUsage(device *d, unsigned *mw) { return *mw = setting("FAKE_NVML_POWER", 350500), answer(d); }
int nvmlDeviceGetEnforcedPowerLimit(device *d, unsigned *mw) { return *mw = 700000, answer(d); }
int nvmlDeviceGetPersistenceMode(device *d, unsigned *on) { return *on = 0, answer(d); }
int nvmlDeviceGetMigMode(device *d, unsigned *now, unsigned *pending) { return *now = d->number == 2, *pending = 0, answer(d); }
int nvmlDeviceGetTemperature(device *d, unsigned sensor, unsigned *celsius) { return *celsius = 50, answer(d); }

#ifndef OLD_DRIVER
typedef struct { unsigned version, sensor; int celsius; } temperature;
int nvmlDeviceGetTemperatureV(device *d, temperature *t) { return t->celsius = 60, answer(d); }
#endif

int nvmlDeviceGetCurrentClocksEventReasons(device *d, unsigned long long *bits) {
    return *bits = setting("FAKE_NVML_REASONS", 0), answer(d);
}

typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process;
int nvmlDeviceGetComputeRunningProcesses_v3(device *d, unsigned *count, process *found) {
    if (answer(d) != SUCCESS) return answer(d);
    if (hidden() != SUCCESS) return hidden();
    if (d->number == 1) return *count = 0, SUCCESS;
    if (*count < 2) return *count = 2, INSUFFICIENT_SIZE;
    *count = 2;
    found[0] = (process){4711, 2048, 0, 0};
    found[1] = (process){4712, ~0ull, 0, 0}; /* its memory is not available */
    return SUCCESS;
}
