# A guest of the launcher's tests: 32-bit code entered by PVH (flat segments, no paging), no stack. BEHAVIOUR is
# given to the assembler:
#   1  says two words on COM1 and writes 21 to the exit port
#   2  causes a triple fault
#   3  hangs
#   4  finds the HyV function, checks the window, logs, rings both doorbells, and waits to be asked to end
#   5  as 4, but garbles its log ring and its state, then ends with code 9
#   6  as 4, but says that it panicked and never leaves
    .section .note.pvh, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long _start

    .set WINDOW, 0xc0000000
    .set DOORBELL, 0xc1000000
    .set USER, WINDOW + 0x1000
    .set LOG, WINDOW + 0xc000

    .text
    .code32

    .macro putc c
    mov $\c, %al
    out %al, %dx
    .endm

    .macro pci_write register, value
    mov $0x80002000 | \register, %eax
    mov $0xcf8, %dx
    out %eax, %dx
    mov $\value, %eax
    mov $0xcfc, %dx
    out %eax, %dx
    .endm

    .globl _start
_start:
    .if BEHAVIOUR == 1
    mov $0x3f8, %dx
    putc 'h'
    putc 'i'
    putc '\n'
    putc 'x'
    mov $21, %al
    out %al, $0xf4
    .endif

    .if BEHAVIOUR == 2
    lidt no_idt
    ud2
    .endif

    .if BEHAVIOUR >= 4
    pci_write 0x10, DOORBELL
    pci_write 0x14, 0xc1001000
    pci_write 0x18, WINDOW
    pci_write 0x1c, 0
    pci_write 0x04, 0x6
    mov $WINDOW, %ebx
    mov $USER, %ebp
    mov $LOG, %edi
    cmpl $0x57565948, (%ebx)
    jne fail
    cmpl $0x31304e49, 4(%ebx)
    jne fail
    # app[0] = ram_len, app[1] = tsc_hz: the launcher compares.
    mov 24(%ebx), %eax
    mov %eax, 64(%ebp)
    mov 28(%ebx), %eax
    mov %eax, 68(%ebp)
    mov 32(%ebx), %eax
    mov %eax, 72(%ebp)
    mov 36(%ebx), %eax
    mov %eax, 76(%ebp)
    # A word of RAM that the launcher reads through its own mapping.
    movl $0x600dcafe, 0x2000000
    # One record: "hello", level info.
    movl $0x03000005, 0x1000(%edi)
    movl $0x6c6c6568, 0x1004(%edi)
    movl $0x0000006f, 0x1008(%edi)
    movl $16, (%edi)
    mov $DOORBELL, %ecx
    movl $0, 12(%ecx)
    movl $1, 12(%ecx)
    movl $3, (%ebp)
    .endif

    .if BEHAVIOUR == 4
1:  pause
    cmpl $0, 272(%ebx)
    je 1b
    movl $5, 4(%ebp)
    movl $4, (%ebp)
    mov $0, %al
    out %al, $0xf4
    .endif

    .if BEHAVIOUR == 5
    movl $0xdeadbeef, (%ebp)
    mov $5000, %esi
2:  rdtsc
    mov %eax, (%edi)
    mov %eax, 4(%edi)
    mov %eax, 8(%edi)
    mov %eax, 0x1010(%edi)
    dec %esi
    jnz 2b
    movl $9, 4(%ebp)
    movl $4, (%ebp)
    mov $0, %al
    out %al, $0xf4
    .endif

    .if BEHAVIOUR == 6
    movl $101, 4(%ebp)
    movl $5, (%ebp)
    .endif

hang:
    hlt
    jmp hang
fail:
    mov $33, %al
    out %al, $0xf4
    jmp hang

no_idt:
    .word 0
    .long 0
