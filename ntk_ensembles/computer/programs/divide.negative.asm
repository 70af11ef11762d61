# Quotient and remainder, by repeated subtraction.
#
# input x: 0 to max
# input y: 1 to max
# result quotient: x divided by y, rounded down
# result remainder: what is left; it replaces x

loop:   y x under               # x <- x - y; negative: once too often
        down quotient           # quotient <- quotient + 1
        zero down loop
under:  y minus                 # minus <- -y
        minus x                 # x <- x + y
        zero down down:-1       # halt; the -1 here is the constant down

x: remainder: . 100
y:      . 7
quotient: . 0
minus:  . 0
zero:   . 0
