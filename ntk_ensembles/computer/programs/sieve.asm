# The sieve of Eratosthenes: of the numbers 2 to 30 the primes stay, all others become 0.
#
# The numbers are the last cells of the memory, and an address counts as negative up to its end: number k is in
# cell k - 31, modulo 64. For each p the operands to and from run over 2 p, 3 p, ... until they are no longer negative.
#
# cells: 64
# result numbers[29]: 2, 3, 0, 5, 0, 7, ...

outer:  from                    # from <- 2 p - 31; not negative: all is done
        minus_start from go
        zero down down:-1       # halt; the -1 here is the constant down
go:     to
        minus_start to          # to <- 2 p - 31
mark:   from:0 to:0             # the cell subtracted from itself
        minus_p from            # the next multiple
        minus_p to mark         # still in memory: go on
        two minus_start         # p <- p + 1
        one minus_p outer       # negative: always goes to outer

minus_start: . 31 - 4
minus_p: . -2
zero:   . 0
one:    . 1
two:    . 2
numbers: . 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30
