/* Between two steps of a program lie microseconds: threads spin for them, and sleep only once nothing has come for a while. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

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

static pthread_mutex_t entrance = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t called = PTHREAD_COND_INITIALIZER;
static int num_started; /* threads besides the caller's */
static atomic_uint calls;
static atomic_int num_sleeping;
static unsigned seen_at_start[MAX_THREADS];
typedef struct {
    atomic_int arrived;
    atomic_uint phase;
} Barrier;
static Barrier inner, outer; /* of those that work on a call, and of all threads at its end */
static Work now_work;
static void *now_what;
static int now_threads;

static void meet(Barrier *barrier, int num_threads) {
    if (num_threads == 1) return;
    unsigned mine = atomic_load(&barrier->phase);
    if (atomic_fetch_add(&barrier->arrived, 1) == num_threads - 1) {
        atomic_store(&barrier->arrived, 0);
        atomic_fetch_add(&barrier->phase, 1);
        return;
    }
    for (int i = 0; atomic_load_explicit(&barrier->phase, memory_order_acquire) == mine; i++)
        if (i < POLITE) PAUSE();
        else sched_yield();
}

void pool_meet(int num_threads) { meet(&inner, num_threads); }

static void *worker(void *number) {
    int thread = (int)(long)number;
    unsigned seen = seen_at_start[thread];
    for (;;) {
        for (int i = 0; atomic_load_explicit(&calls, memory_order_acquire) == seen; i++) {
            if (i < SLEEPY) {
                if (i > POLITE && i % 64 == 0) sched_yield();
                PAUSE();
                continue;
            }
            pthread_mutex_lock(&lock);
            atomic_fetch_add(&num_sleeping, 1);
            while (atomic_load(&calls) == seen) pthread_cond_wait(&called, &lock);
            atomic_fetch_sub(&num_sleeping, 1);
            pthread_mutex_unlock(&lock);
        }
        seen = atomic_load(&calls);
        int num_threads = now_threads;
        if (thread < num_threads) now_work(now_what, thread, num_threads);
        meet(&outer, num_started + 1); /* all have seen this call: the next may come */
    }
    return NULL;
}

static void forget_threads(void) { /* a child process has none of them */
    num_started = 0;
    atomic_store(&inner.arrived, 0);
    atomic_store(&outer.arrived, 0);
    atomic_store(&num_sleeping, 0);
    pthread_mutex_init(&entrance, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&called, NULL);
}

static void start(int num_threads) {
    static int is_watched;
    if (!is_watched) is_watched = !pthread_atfork(NULL, NULL, forget_threads);
    while (num_started < num_threads - 1) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        seen_at_start[num_started + 1] = atomic_load(&calls);
        if (pthread_create(&thread, &attributes, worker, (void *)(long)(num_started + 1))) break;
        num_started++;
    }
}

void pool_enter(void) { pthread_mutex_lock(&entrance); }
void pool_leave(void) { pthread_mutex_unlock(&entrance); }

void pool_run(int num_threads, Work work, void *what) {
    if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
    if (num_threads - 1 > num_started) start(num_threads);
    if (num_threads - 1 > num_started) num_threads = num_started + 1;
    if (num_threads <= 1) {
        work(what, 0, 1);
        return;
    }
    now_work = work, now_what = what, now_threads = num_threads;
    atomic_fetch_add(&calls, 1);
    if (atomic_load(&num_sleeping)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&called);
        pthread_mutex_unlock(&lock);
    }
    work(what, 0, num_threads);
    meet(&outer, num_started + 1);
}
