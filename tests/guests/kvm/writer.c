/* A guest that writes just what it is told to, for comparing dirty logs:
 * freestanding, 32-bit protected mode, entered by PVH. A line on port 0x2f8,
 *   FIRST COUNT STRIDE
 * writes a word in each of COUNT pages; the answer on 0x3f8 is DONE and the
 * number of the line. Besides it writes its own image at 1 MiB only.
 */
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define PAGE 4096u

__asm__(
	".section .text.entry,\"ax\"\n"
	".globl entry\n"
	"entry:\n"
	"	cli\n"
	"	movl $stack_top, %esp\n"
	"	call guest_main\n"
	"	.data\n"
	"	.balign 16\n"
	"	.fill 4096, 1, 0\n"
	"stack_top:\n"
	"	.text\n");

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

/* A number and the character after it. */
static u32 number(void)
{
	u32 v = 0;
	for (;;) {
		while (!(in8(0x2fd) & 1)) __asm__ volatile("pause");
		u8 c = in8(0x2f8);
		if (c < '0' || c > '9') return v;
		v = v * 10 + (u32)(c - '0');
	}
}

void guest_main(void)
{
	put("READY\n");
	for (u32 line = 1;; line++) {
		u32 page = number(), count = number(), stride = number();
		for (; count--; page += stride) *(volatile u32 *)(page * PAGE) = line;
		put("DONE ");
		put_number(line);
		put("\n");
	}
}
