/* Runs of the pool one after another, of all lengths and numbers of threads, more of these than cores: some are always set aside, and come
 * back when their run is over and others are on. Each step looks at what the one before has left. */
#include "../../kernels/cpu/pool.c"

#define STEPS 40
#define UNITS 13

typedef struct {
    int run, is_right, left[STEPS][UNITS];
} Relay;

static int count(const void *what, int step) { return (step * 7 + ((const Relay *)what)->run) % UNITS; }

static int value(const Relay *relay, int step, int unit) { return relay->run * 1000 + step * UNITS + unit; }

static int is_done(const Relay *relay, int step) {
    for (int unit = 0; unit < count(relay, step); unit++)
        if (relay->left[step][unit] != value(relay, step, unit)) return 0;
    return 1;
}

static void unit(void *what, int step, int unit, int thread) {
    Relay *relay = what;
    (void)thread;
    if (step && !is_done(relay, step - 1)) __atomic_store_n(&relay->is_right, 0, __ATOMIC_RELAXED);
    relay->left[step][unit] += value(relay, step, unit); /* twice would show */
}

int main(void) {
    for (int run = 0; run < 20000; run++) {
        Relay relay = {.run = run, .is_right = 1};
        Work work = {&relay, 1 + run % STEPS, 1, count, unit};
        pool_enter();
        if (pool_run(1 + run % 9, &work)) return 2;
        for (int step = 0; step < work.num_steps; step++) relay.is_right &= is_done(&relay, step);
        pool_leave();
        if (!relay.is_right) return 1;
    }
    return 0;
}
