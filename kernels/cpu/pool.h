/* Threads that work on one thing at a time, and meet at barriers. */
#ifndef FORERUN_POOL_H
#define FORERUN_POOL_H

#define MAX_THREADS 256

typedef void (*Work)(void *what, int thread, int num_threads);
/* Runs `work` on so many threads at once, the caller's the first; fewer, if the system gives no more. One run at a time: others wait. */
void pool_run(int num_threads, Work work, void *what);
/* All threads of a run wait here for each other. */
void pool_meet(int num_threads);
/* Before and after a run's data are touched by its caller. */
void pool_enter(void);
void pool_leave(void);

#endif
