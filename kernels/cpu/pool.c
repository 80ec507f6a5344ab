/* Between two steps lie microseconds: threads spin for them, and sleep only once nothing has come for a while.
 *
 * A thread that is late finds all units of a step taken and goes on to the next. It may be so late that the run has ended, and others have
 * begun: what it looks at to find that out is the pool's own, and not used again while somebody is in it. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

/* Rounds of spinning before the processor is left to others now and then, and before a thread goes to sleep: some 20 microseconds, and 2
 * milliseconds, for that is what lies between two tokens, and to be woken costs a tenth of one of a small model. */
#define POLITE 500
#define SLEEPY 50000
/* The same, some 200 microseconds, before a thread that waits for the units of others leaves the processor to whoever took theirs. */
#define PATIENT 5000

typedef struct {
    _Alignas(64) atomic_int num_taken;
    atomic_int num_done;
    int num_units;
} Step;

/* A run. It has one place of several, and a number of its own. */
typedef struct {
    _Alignas(64) atomic_int num_inside; /* threads, besides the caller's */
    Work work;
    int num_threads, capacity;
    Step *steps;
} Run;

/* One more than there can be threads in former runs. */
#define NUM_PLACES (MAX_THREADS + 1)
static Run runs[NUM_PLACES];
static _Atomic uint64_t now; /* the number of the run that is on, times NUM_PLACES, plus its place; 0: none */
static uint64_t number;
static atomic_int num_sleeping;
static int num_started; /* threads besides the caller's */
static pthread_mutex_t entrance = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t called = PTHREAD_COND_INITIALIZER;

/* Returns how it was. */
static uint64_t flush_tiny(int is_new, uint64_t was) {
#if defined(__x86_64__)
    unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(is_new ? before | 0x8040 : (unsigned)was);
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(is_new ? before | 1 << 24 : was));
    return before;
#else
    (void)is_new;
    return was;
#endif
}

static void go_through(Run *run, int thread) {
    uint64_t was = run->work.flushes ? flush_tiny(1, 0) : 0;
    for (int i = 0; i < run->work.num_steps; i++) {
        Step *step = run->steps + i;
        int num_mine = 0, num_done;
        while (atomic_load_explicit(&step->num_taken, memory_order_relaxed) < step->num_units) {
            int unit = atomic_fetch_add_explicit(&step->num_taken, 1, memory_order_relaxed);
            if (unit >= step->num_units) break;
            run->work.unit(run->work.what, i, unit, thread);
            num_mine++;
        }
        if (num_mine) num_done = atomic_fetch_add_explicit(&step->num_done, num_mine, memory_order_acq_rel) + num_mine;
        else num_done = atomic_load_explicit(&step->num_done, memory_order_acquire);
        for (int spins = 0; num_done < step->num_units; num_done = atomic_load_explicit(&step->num_done, memory_order_acquire))
            if (spins++ < PATIENT) PAUSE();
            else sched_yield();
    }
    if (run->work.flushes) flush_tiny(0, was);
}

/* The next run after `last`. */
static uint64_t wait_for(uint64_t last) {
    uint64_t found;
    for (int i = 0; !(found = atomic_load(&now)) || found == last; i++) {
        if (i < SLEEPY) {
            if (i > POLITE && i % 64 == 0) sched_yield();
            PAUSE();
            continue;
        }
        pthread_mutex_lock(&lock);
        atomic_fetch_add(&num_sleeping, 1);
        while (!(found = atomic_load(&now)) || found == last) pthread_cond_wait(&called, &lock);
        atomic_fetch_sub(&num_sleeping, 1);
        pthread_mutex_unlock(&lock);
    }
    return found;
}

static void *worker(void *thread) {
    for (uint64_t mine = 0;;) {
        mine = wait_for(mine);
        Run *run = runs + mine % NUM_PLACES;
        atomic_fetch_add(&run->num_inside, 1);
        if (atomic_load(&now) == mine && (int)(intptr_t)thread < run->num_threads) go_through(run, (int)(intptr_t)thread);
        atomic_fetch_sub(&run->num_inside, 1);
    }
    return NULL;
}

static void forget_threads(void) { /* a child process has none of them */
    num_started = 0;
    atomic_store(&now, 0);
    atomic_store(&num_sleeping, 0);
    for (int i = 0; i < NUM_PLACES; i++) atomic_store(&runs[i].num_inside, 0);
    pthread_mutex_init(&entrance, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&called, NULL);
}

static void start(int num_threads) {
    static int is_watched;
    if (!is_watched) is_watched = !pthread_atfork(NULL, NULL, forget_threads);
    while (num_started < num_threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)(num_started + 1))) break;
        pthread_detach(thread);
        num_started++;
    }
}

void pool_enter(void) { pthread_mutex_lock(&entrance); }
void pool_leave(void) { pthread_mutex_unlock(&entrance); }

int pool_run(int num_threads, const Work *work) {
    static int num_last = 1;
    Run *run = runs;
    num_threads = num_last = num_threads ? num_threads : num_last;
    while (atomic_load(&run->num_inside)) run++;
    if (run->capacity < work->num_steps) {
        free(run->steps);
        run->steps = aligned_alloc(64, (size_t)work->num_steps * sizeof *run->steps);
        run->capacity = run->steps ? work->num_steps : 0;
        if (!run->steps) return -1;
    }
    run->work = *work, run->num_threads = num_threads < MAX_THREADS ? num_threads : MAX_THREADS;
    for (int i = 0; i < work->num_steps; i++) {
        atomic_init(&run->steps[i].num_taken, 0);
        atomic_init(&run->steps[i].num_done, 0);
        run->steps[i].num_units = work->count(work->what, i);
    }
    if (run->num_threads > 1) {
        if (run->num_threads - 1 > num_started) start(run->num_threads);
        atomic_store(&now, ++number * NUM_PLACES + (uint64_t)(run - runs));
        if (atomic_load(&num_sleeping)) {
            pthread_mutex_lock(&lock);
            pthread_cond_broadcast(&called);
            pthread_mutex_unlock(&lock);
        }
    }
    go_through(run, 0);
    atomic_store(&now, 0);
    return 0;
}
