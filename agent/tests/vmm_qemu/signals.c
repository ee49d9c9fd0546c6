/* Counts the real-time signals it gets and checks that each arrives whole and
   in order, while it sits in a system call nearly all the time. Prints the
   count when SIGTERM comes. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static volatile sig_atomic_t count, wrong, end;
static void on_rt(int s, siginfo_t *i, void *c) {
	(void)s; (void)c;
	if (i->si_code != SI_QUEUE || i->si_value.sival_int != count) wrong++;
	count++;
}
static void on_term(int s) { (void)s; end = 1; }

int main(void) {
	struct sigaction rt = { .sa_sigaction = on_rt, .sa_flags = SA_SIGINFO };
	struct sigaction term = { .sa_handler = on_term };
	sigaction(SIGRTMIN, &rt, 0);
	sigaction(SIGTERM, &term, 0);
	puts("ready");
	fflush(stdout);
	while (!end) {
		int before = count;
		/* A stop by the tracer must not show: poll goes on by itself. */
		if (poll(0, 0, 20) < 0 && (errno != EINTR || (before == count && !end))) wrong++;
	}
	printf("%d signals, %d wrong\n", (int)count, (int)wrong);
	return 0;
}
