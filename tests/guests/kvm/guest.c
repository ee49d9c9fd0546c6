/* The lab's guest for real KVM: freestanding, 32-bit protected mode, entered
 * by PVH. It fills part of its RAM with content that it can compute again,
 * keeps writing at a given rate, checks itself for ever, and speaks the same
 * lines as the Linux guest: READY, TICK, VERIFIED, CORRUPT on port 0x3f8;
 * commands (idle, busy KB_PER_S, verify) on port 0x2f8.
 *
 * Parameters on the PVH command line, sizes in MiB:
 *   seed=  common= (same in all guests)  own= (by seed)  ws= (written)  rate= (KB/s)
 */
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#define PAGE 4096u
#define WORDS (PAGE / 4)
#define HZ 100u
#define TICK_EVERY (HZ / 5)
/* A u32 a page of the working set: enough for 1 GiB. */
#define VERSIONS ((volatile u32 *)0x200000)
#define FIRST_PAGE (0x400000u / PAGE)
#define CHECK_PER_TIMER 4u

__asm__(
	".section .text.entry,\"ax\"\n"
	".globl entry\n"
	"entry:\n"
	"	cli\n"
	"	movl $stack_top, %esp\n"
	"	lgdt gdt_pointer\n"
	"	ljmp $8, $1f\n"
	"1:	movw $16, %ax\n"
	"	movw %ax, %ds\n"
	"	movw %ax, %es\n"
	"	movw %ax, %ss\n"
	"	movw %ax, %fs\n"
	"	movw %ax, %gs\n"
	"	pushl %ebx\n"
	"	call guest_main\n"
	"2:	hlt\n"
	"	jmp 2b\n"
	/* Waits for the timer in real mode: a KVM that emulates the guest (PVM)
	 * delivers interrupts there only. The code is copied to 0x7000 first. */
	".globl wait_timer\n"
	"wait_timer:\n"
	"	pushal\n"
	"	movl %esp, kept_esp\n"
	"	ljmp $0x18, $0x7000\n"
	".globl low_code\n"
	"low_code:\n"
	"	.code16\n"
	"	movw $0x20, %ax\n"
	"	movw %ax, %ds\n"
	"	movw %ax, %es\n"
	"	movw %ax, %ss\n"
	"	movl %cr0, %eax\n"
	"	andb $0xfe, %al\n"
	"	movl %eax, %cr0\n"
	"	ljmpw $0, $(0x7000 + 1f - low_code)\n"
	"1:	xorw %ax, %ax\n"
	"	movw %ax, %ds\n"
	"	movw %ax, %es\n"
	"	movw %ax, %ss\n"
	"	movw $0x6ff0, %sp\n"
	"	lidtw 0x7000 + 3f - low_code\n"
	"	sti\n"
	"	hlt\n"
	"	cli\n"
	"	movl %cr0, %eax\n"
	"	orb $1, %al\n"
	"	movl %eax, %cr0\n"
	"	ljmpl $8, $back\n"
	".globl low_timer\n"
	"low_timer:\n"
	"	pushw %ax\n"
	"	incl 0x6000\n"
	"	movb $0x20, %al\n"
	"	outb %al, $0x20\n"
	"	popw %ax\n"
	"	iretw\n"
	"3:	.word 0x3ff\n"
	"	.long 0\n"
	".globl low_end\n"
	"low_end:\n"
	"	.code32\n"
	"back:	movw $16, %ax\n"
	"	movw %ax, %ds\n"
	"	movw %ax, %es\n"
	"	movw %ax, %ss\n"
	"	movl kept_esp, %esp\n"
	"	popal\n"
	"	ret\n"
	"	.data\n"
	"	.balign 8\n"
	/* Flat 32-bit code and data, then 16-bit ones on the way to real mode. */
	"gdt:	.quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff\n"
	"	.quad 0x00009a000000ffff, 0x000092000000ffff\n"
	"gdt_pointer: .word 39\n"
	"	.long gdt\n"
	"kept_esp: .long 0\n"
	"	.balign 16\n"
	"	.fill 16384, 1, 0\n"
	"stack_top:\n"
	"	.text\n");

extern u8 low_code[], low_timer[], low_end[];
void wait_timer(void);

/* Counted by the timer's interrupt; low memory, for real mode reaches it. */
#define JIFFIES (*(volatile u32 *)0x6000)

static u32 seed, common_pages, own_pages, ws_pages, rate_kb;
static u32 written, due_rest, sweeps, sweep_at, verified, bad_pages, bad_first;
static u32 random_state = 1;

static void out8(u16 port, u8 v) { __asm__ volatile("outb %0, %1" :: "a"(v), "Nd"(port)); }
static u8 in8(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }

static void put(const char *s) { for (; *s; s++) out8(0x3f8, (u8)*s); }

static void put_number(u32 v)
{
	char digits[11];
	u32 n = 10;
	digits[n] = 0;
	do { digits[--n] = (char)('0' + v % 10); v /= 10; } while (v);
	put(digits + n);
}

static void pair(const char *name, u32 v) { put(name); put_number(v); }

static u32 mix(u32 x)
{
	x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu; x ^= x >> 16;
	return x;
}

/* A kernel whose KVM has no hardware virtualisation (PVM) emulates this guest
 * instruction by instruction. String instructions are what it does fast, so a
 * page is a stretch of a random template, at an offset that depends on the
 * page, with a word of its own at the start of each of its 16 segments. */
#define SEGMENTS 16u
#define SEGMENT (WORDS / SEGMENTS)
static u32 template[2 * WORDS];

static u32 step(u32 x) { x ^= x << 13; x ^= x >> 17; x ^= x << 5; return x; }

static void make_template(void)
{
	u32 x = 0x1234567;
	for (u32 i = 0; i < 2 * WORDS; i++) template[i] = x = step(x);
}

/* What a page's words are made of: the same in all guests for common pages;
 * for the others never the same in two guests or two versions. */
static u32 key_of(u32 page, u32 version)
{
	u32 own = page < common_pages ? 0 : seed * 0x9e3779b9u + 1;
	return mix(mix(page + own) ^ (version * 0x85ebca6bu));
}

static volatile u32 *words_of(u32 page) { return (volatile u32 *)((FIRST_PAGE + page) * PAGE); }
static const u32 *template_of(u32 key) { return template + (key & (WORDS - 1)); }

/* An even version wrote the whole page; an odd one changed 64 bytes of it. */
static u32 block_of(u32 version) { return (version * 7 % 64) * 16; }

static void write_page(u32 page, u32 version)
{
	volatile u32 *w = words_of(page);
	u32 key = key_of(page, version);
	if (version & 1) {
		w += block_of(version);
		for (u32 i = 0; i < 16; i++) w[i] = key + i;
		return;
	}
	const u32 *from = template_of(key);
	volatile u32 *to = w;
	u32 count = WORDS;
	__asm__ volatile("cld; rep movsl" : "+S"(from), "+D"(to), "+c"(count) :: "memory");
	for (u32 s = 0; s < SEGMENTS; s++) w[s * SEGMENT] = key + s;
}

static u32 same(const volatile u32 *a, const u32 *b, u32 count)
{
	u8 equal;
	__asm__ volatile("cld; cmpl %%eax, %%eax; repe cmpsl; sete %3"
		: "+S"(a), "+D"(b), "+c"(count), "=q"(equal) :: "memory", "cc");
	return equal;
}

static u32 page_is_right(u32 page, u32 version)
{
	volatile u32 *w = words_of(page);
	u32 base = key_of(page, version & ~1u), changed = key_of(page, version);
	const u32 *from = template_of(base);
	u32 block = version & 1 ? block_of(version) : WORDS;
	for (u32 at = 0; at < WORDS; at += SEGMENT) {
		if (block < at || block >= at + SEGMENT) {
			if (w[at] != base + at / SEGMENT) return 0;
			if (!same(w + at + 1, from + at + 1, SEGMENT - 1)) return 0;
			continue;
		}
		for (u32 i = at; i < at + SEGMENT; i++) {
			u32 want = i == at ? base + at / SEGMENT : from[i];
			if (i - block < 16) want = changed + (i - block);
			if (w[i] != want) return 0;
		}
	}
	return 1;
}

static u32 all_pages(void) { return common_pages + own_pages + ws_pages; }

static u32 version_of(u32 page)
{
	u32 still = common_pages + own_pages;
	return page < still ? 0 : VERSIONS[page - still];
}

static void check(u32 count)
{
	while (count--) {
		if (!page_is_right(sweep_at, version_of(sweep_at))) {
			if (!bad_pages) bad_first = sweep_at;
			bad_pages++;
		}
		if (++sweep_at == all_pages()) { sweep_at = 0; sweeps++; }
	}
}

static void write_due(void)
{
	/* pages a timer tick = rate_kb * 1000 / 4096 / HZ; the rest is carried. */
	due_rest += rate_kb * 10;
	u32 due = due_rest / 4096;
	due_rest %= 4096;
	while (due-- && ws_pages) {
		random_state = step(random_state);
		u32 i = random_state % ws_pages;
		VERSIONS[i]++;
		write_page(common_pages + own_pages + i, VERSIONS[i]);
		written++;
	}
}

static void corrupt(void)
{
	pair("CORRUPT ", bad_pages); pair(" checks failed, first page ", bad_first); put("\n");
}

static u32 number(const char *s)
{
	u32 v = 0;
	while (*s >= '0' && *s <= '9') v = v * 10 + (u32)(*s++ - '0');
	return v;
}

static u32 starts(const char *s, const char *with)
{
	while (*with) if (*s++ != *with++) return 0;
	return 1;
}

static u32 param(const char *line, const char *name)
{
	for (; *line; line++)
		if (starts(line, name)) {
			while (*line != '=') line++;
			return number(line + 1);
		}
	return 0;
}

static void command(const char *line)
{
	if (starts(line, "busy ")) rate_kb = number(line + 5);
	else if (starts(line, "idle")) rate_kb = 0;
	else if (starts(line, "verify")) {
		sweep_at = 0;
		check(all_pages());
		if (bad_pages) return corrupt();
		pair("VERIFIED ", ++verified); pair(" pages=", all_pages()); put("\n");
	} else { put("ignored command "); put(line); put("\n"); }
}

static void poll_commands(void)
{
	static char line[64];
	static u32 n;
	while (in8(0x2fd) & 1) {
		char c = (char)in8(0x2f8);
		if (c == '\n') { line[n] = 0; n = 0; command(line); }
		else if (n < sizeof line - 1) line[n++] = c;
	}
}

static void start_timer(void)
{
	for (u32 i = 0; low_code + i < low_end; i++) ((volatile u8 *)0x7000)[i] = low_code[i];
	/* Only the timer is let through, but a PIC may raise a spurious one. The
	 * table lies at 0, which compilers take for no address at all. */
	volatile u32 *vector;
	__asm__("xorl %0, %0" : "=r"(vector));
	for (u32 i = 0; i < 48; i++) vector[i] = 0x7000 + (u32)(low_timer - low_code);
	JIFFIES = 0;
	/* Both PICs to vectors 32..47, only the timer's line open. */
	out8(0x20, 0x11); out8(0x21, 32); out8(0x21, 4); out8(0x21, 1); out8(0x21, 0xfe);
	out8(0xa0, 0x11); out8(0xa1, 40); out8(0xa1, 2); out8(0xa1, 1); out8(0xa1, 0xff);
	u32 divisor = 1193182 / HZ;
	out8(0x43, 0x34); out8(0x40, (u8)divisor); out8(0x40, (u8)(divisor >> 8));
}

struct start_info { u32 magic, version, flags, nr_modules; u64 modlist, cmdline, rsdp; };

void guest_main(const struct start_info *info)
{
	/* FIFO on, so that a command line fits between two polls. */
	out8(0x2fa, 7); out8(0x3fa, 7);
	if (info->magic != 0x336ec578u || !info->cmdline) {
		put("CORRUPT no PVH command line\n");
		return;
	}
	const char *line = (const char *)(u32)info->cmdline;
	seed = param(line, "seed=");
	common_pages = param(line, "common=") * 256;
	own_pages = param(line, "own=") * 256;
	ws_pages = param(line, "ws=") * 256;
	rate_kb = param(line, "rate=");
	random_state = mix(seed + 77) | 1;
	make_template();
	for (u32 i = 0; i < ws_pages; i++) VERSIONS[i] = 0;
	for (u32 p = 0; p < all_pages(); p++) write_page(p, 0);
	start_timer();
	pair("READY seed=", seed); pair(" pages=", all_pages()); put("\n");

	u32 seen = 0, ticks = 0;
	for (;;) {
		wait_timer();
		while (seen != JIFFIES) {
			seen++;
			write_due();
			check(CHECK_PER_TIMER);
			poll_commands();
			if (seen % TICK_EVERY) continue;
			if (bad_pages) { corrupt(); continue; }
			pair("TICK ", ++ticks); pair(" ok sweeps=", sweeps);
			pair(" w=", written); pair(" rate=", rate_kb); put("\n");
		}
	}
}
