# The greatest common divisor, by repeated subtraction.
#
# input x: 1 to max
# input y: 1 to max
# result gcd: the greatest common divisor of x and y; it replaces y

loop:   y x less                # x <- x - y; negative: x was smaller
        one x down:-1           # was it equal? halt; this -1 is the constant down
        down x
        zero down loop
less:   minus                   # minus <- -y
        y minus
        minus x                 # x <- x + y
        x y                     # y <- y - x
        zero down loop

x:      . 91
y: gcd: . 35
minus:  . 0
one:    . 1
zero:   . 0
