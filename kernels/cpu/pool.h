/* Threads that work off the steps of one thing at a time. A step begins once all units of the one before are done: not when all threads
 * have come, so that a thread which the system has set aside between two units holds up nobody. */
#ifndef FORERUN_POOL_H
#define FORERUN_POOL_H

#define MAX_THREADS 256

/* What is to be done: so many units in each step, and one of them, by one of the threads 0, 1, ... `count` is asked before all begins.
 * `flushes`: numbers too small for a normal float count as zero. States that decay would otherwise end in them, and take a hundred times
 * longer. */
typedef struct {
    void *what;
    int num_steps, flushes;
    int (*count)(const void *what, int step);
    void (*unit)(void *what, int step, int unit, int thread);
} Work;
/* Does it with at most so many threads (0: as many as the last run had), the caller's the first; -1 when there is no memory, and then nothing is done. One at a time: see
 * pool_enter. */
int pool_run(int num_threads, const Work *work);
/* Before and after the data of a run are touched by its caller; others wait. */
void pool_enter(void);
void pool_leave(void);

#endif
