# Quotient and remainder, by repeated subtraction.
#
# input x: 0 to max
# input y: 1 to max
# result quotient: x divided by y, rounded down
# result remainder: what is left; it replaces y

        x debt                  # debt <- -x
        y minus                 # minus <- -y
        zero zero try
more:   down quotient           # quotient <- quotient + 1
try:    minus debt more         # debt <- debt + y; at most 0: there was y to take
        debt y                  # y <- y - debt, as debt is y less the remainder
        zero zero down:-1       # halt; the -1 here is the constant down

x:      . 100
y: remainder: . 7
quotient: . 0
debt:   . 0
minus:  . 0
zero:   . 0
